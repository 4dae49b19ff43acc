"""Images, chart, rules and drain, with the real tools; only when named: `make test-deploy`."""
