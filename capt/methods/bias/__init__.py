"""Parts of :class:`capt.methods.center_bias.CenterBias`: where a bias arises, and what helps against it."""
