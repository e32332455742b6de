"""How config.json says what a model is: what families share, layers of unequal widths, fields and their errors."""
