"""From files to samples: video, crops, lists, rendered clips. Imports the rooms before it."""
