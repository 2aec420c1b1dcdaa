"""English words that another word must follow: a caption that ends in one is cut off."""

# The closed classes of English, and the list `bad_endings` of github.com/ruotianluo/ImageCaptioning.pytorch
# (captioning/models/AttModel.py). 1% of Flickr8k's captions end in one of these words, most of them in "on".
ENGLISH = frozenset({
    "a", "an", "the", "this", "these", "his", "its", "their", "and", "or", "but", "while", "as", "that", "which", "who",
    "of", "with", "in", "on", "at", "to", "from", "by", "for", "into", "onto", "near", "next", "over", "under", "very",
    "between", "through", "across", "beside", "along", "against", "during", "before", "after", "upon",
    "am", "is", "are", "was", "were", "be", "being",
})  # fmt: skip
