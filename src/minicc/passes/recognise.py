"""Recognition of decomposed patterns into canonical ops. (Taken by another author; do not write it here.)"""
