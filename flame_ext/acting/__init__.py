"""Engines that compute a saved policy's actions; the native one imports no torch."""
