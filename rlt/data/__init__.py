"""Problems: where they come from, how they are checked, split and turned into token ids."""
