"""The command line: check the words, then call one function of the library. No science here."""
