"""What every room needs of a network and its tokenizer: a directory opened, checked, saved and
hashed; its head and hidden states; its chats, tokens and ends.
"""
