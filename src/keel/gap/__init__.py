"""The engine gap: measured against its noise floor, explained in words, and what each correction would do about it.

`measure` and `remedies` are pure; `floor` asks a policy; `command` is `keel gap`.
"""
