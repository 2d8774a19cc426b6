"""Pixels and samples in and out of media files, exact to the frame and to the audio sample.

A file that cannot be read is a MetadataError that names it; nothing is ever replaced by something else. Decoders can
hang on a broken file, so loaders call this where it can be killed.
"""
