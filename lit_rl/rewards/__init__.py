"""What a response is worth: checkers that read text and never run it."""
