"""Data for training: checked, cleaned, built, and handed out by how much there is to learn from them."""
