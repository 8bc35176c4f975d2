"""What can be measured: each module has run(session, shape, form, options)."""
