"""What models are measured on, and the report that shows it; shared by a run's report and the commands in eval/."""
