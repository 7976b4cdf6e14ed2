"""What runs when, and where: pure decisions, fed what happens and when."""
