"""The command `spvit`: words in, tables out."""
