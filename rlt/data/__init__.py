"""Problems: their sources, and how they are checked, split and turned into token ids."""
