# Short names for ./run, which does the work and also runs where there is no make. ARGS="…" is passed on.
.DEFAULT_GOAL := help
.PHONY: help demo test check typecheck bench size

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## set up, start a cluster on this machine, ask it one question, keep serving
	@./run demo $(ARGS)

test: ## set up and pass the tests
	@./run test $(ARGS)

check: ## linter, format, types, and a proof that the type check can fail
	@./run check

typecheck: ## types only
	@./run typecheck

bench: ## measure the real model on this machine
	@./run bench $(ARGS)

size: ## lines of code by folder
	@./run size
