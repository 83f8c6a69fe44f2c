"""What an export needs before others may have it: its proof, its licence, no secrets; and the way to the Hub."""
