"""What all recipes share: settings, the start of a run, its images, models, checkpoints."""
