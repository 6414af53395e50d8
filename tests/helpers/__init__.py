"""What several test files share: tiny models, a driver without a page manager."""
