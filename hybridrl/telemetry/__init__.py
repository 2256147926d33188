"""What a run tells: metrics under verl's names, trackers, console, HTML report, and a gate on the outcome."""
