"""Small programs that embed the runtime, to read and to copy from."""
