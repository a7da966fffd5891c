"""A judge that reads solutions step by step, its measured errors, and the loop that trains them away."""
