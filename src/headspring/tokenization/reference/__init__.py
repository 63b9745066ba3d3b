"""The three trainers as their papers describe them: short, slow, obvious; the tests hold the library against them."""
