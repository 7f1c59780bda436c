"""Knowledge distillation: losses, the hook that adds them, and teachers."""
