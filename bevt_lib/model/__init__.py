"""The networks: masks, Swin, BEVT and the classifier. Imports base."""
