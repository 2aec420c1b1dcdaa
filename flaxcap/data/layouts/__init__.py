"""Layouts of captioned image folders: one module recognises and reads each."""
