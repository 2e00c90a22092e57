"""Pages about runs and models: a report in HTML, a card on the hub."""
