"""Parts of a block, made to need little memory or to be watched."""
