"""Models from files, folders and hubs, in the form that training and classifying need."""
