"""What trains a trial; knows nothing of Ray."""
