# test: what CI runs. test-all: every combination of models and recipes, long; hours on two cores.
.PHONY: quickstart test test-all
quickstart:
	bash scripts/quickstart.sh
test:
	bash scripts/test.sh
test-all:
	bash scripts/test.sh --whole --stress-steps 1000
