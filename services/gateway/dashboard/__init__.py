"""The live page and what it reads."""
