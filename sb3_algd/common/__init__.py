"""What any off-policy algorithm under a cost limit needs. Nothing here knows of a particular algorithm."""
