"""keel's objectives inside other people's trainers, their configurations written from recipes, and environments as tasks.

One file a framework, each of which says with which version it was written. Nothing here is imported by the rest of keel.
"""
