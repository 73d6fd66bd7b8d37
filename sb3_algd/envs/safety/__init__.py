"""The environments that need MuJoCo or safety-gymnasium. Neither is imported before one of them is made."""
