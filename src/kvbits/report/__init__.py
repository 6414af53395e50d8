"""Everything that was measured and planned for one model, on one page."""
