"""Work before and after it is done: how lanes share it out, simulations of that, what a run takes and costs."""
