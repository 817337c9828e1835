"""choose-layout and sink-transposes. (The lead is writing this file; do not write these two passes elsewhere.)"""
