//! What an object is: the schema of every kind and the rules that hold for it.
