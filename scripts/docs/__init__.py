"""The site of jkv: a page for each public name, a glossary, guides, notebooks, and `llms.txt`."""
