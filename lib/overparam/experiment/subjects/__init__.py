"""Models with what their quality is: an encoder's tasks, a decoder's texts, a translator's sentences.

A subject scores a *run*: the model in whatever form a system has it, such as a module or an exported graph.
"""
