"""Model families: networks, tokenizers and files of one kind of model."""
