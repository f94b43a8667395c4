"""Where images come from: a registry speaking the distribution API (`client`), or an image layout (`layout`)."""
