"""One module a format. ``base`` finds and drives them; ``records`` and ``streams`` are what they share."""
