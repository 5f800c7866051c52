"""The commands of `seqpar-ring`, one file each: a function whose arguments are the command's options.

A command reads its options, calls the library and prints; what it prints is made elsewhere. What costs seconds to
import, torch above all, is imported by the command that needs it, when it runs.
"""
