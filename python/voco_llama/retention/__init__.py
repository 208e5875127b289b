"""What compression keeps: every system of the paper, trained on a task about digits, in tables as the paper has them."""
