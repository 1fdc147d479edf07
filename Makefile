# mission and koi: nothing is built. `make help` lists the targets.

PYTHON ?= python3
PREFIX ?= /usr/local
DESTDIR ?=
BIN = $(DESTDIR)$(PREFIX)/bin
MAN = $(DESTDIR)$(PREFIX)/share/man
MISSION_TOPICS = config tasks behaviour security status
KOITAB_TOPICS = tab arguments settings dashboard alerts ping api files \
	behaviour security status
PAGES = $(MAN)/man1/mission.1 $(MISSION_TOPICS:%=$(MAN)/man7/mission-%.7) \
	$(MAN)/man1/koitab.1 $(KOITAB_TOPICS:%=$(MAN)/man7/koitab-%.7)
# What the tests start for real, as Debian calls it.
PARTS = acl apache2-bin bash bindfs borgbackup busybox caddy chromium chromium-driver cron dbus dunst e2fsprogs etcd-client etcd-server faketime firefox-esr fish fonts-dejavu-core fuse3 git gnupg groff-base \
	haproxy iproute2 libcap2-bin libfaketime libnotify-bin mandoc moreutils msmtp msmtp-mta nginx-light openssl pass postgresql procps prometheus python3 python3-pip python3-pytest \
	restic rsync strace systemd tzdata util-linux webkit2gtk-driver xvfb zsh
# From trixie on old names of time zones are in a package of their own.
PARTS_IF_THERE = tzdata-legacy
# A client of Healthchecks, for Debian's Python. Only its test uses it.
CLIENT = healthchecks-io==0.4.4

.PHONY: help demo test test-all parts bench pictures lint install uninstall sums

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 20

demo: ## see mission and koi work, in a scratch folder, without root
	@$(PYTHON) tests/demo.py

test: ## run the tests (STRICT=1: a skipped test is a failure)
	@exec $(PYTHON) -B tests/run.py

test-all: ## also the long sweeps, and with every Python from 3.9 that is found
	@exec $(PYTHON) -B tests/run.py --full --every-python

parts: ## install the real parts the tests use (Debian, as root)
	apt-get update -q
	DEBIAN_FRONTEND=noninteractive apt-get install -y -q \
	    --no-install-recommends $(PARTS) \
	    $$(apt-cache pkgnames | grep -x $(PARTS_IF_THERE))
	-/usr/bin/python3 -m pip install -q --root-user-action=ignore --upgrade \
	    --target .test-env/healthchecks-io $(CLIENT)
	-/usr/bin/python3 tests/fetch_axe.py

bench: ## measure, side by side with a baseline or a peer
	$(PYTHON) tests/bench/mission.py
	$(PYTHON) tests/bench/koi.py --quick
	$(PYTHON) tests/bench/dashboard.py --quick
	$(PYTHON) tests/bench/page.py --quick

pictures: ## take the README's pictures of the dashboard (needs chromium)
	@$(PYTHON) -B tests/pictures.py

lint: ## unused names and other slips (needs ruff)
	ruff check --no-cache --config tests/ruff.toml mission.py koitab.py tests

install: ## copy mission, koitab and koid to $(PREFIX)/bin, and manual pages
	umask 022; install -d $(BIN) $(MAN)/man1 $(MAN)/man7 $(MAN)/man8
	install -m 0755 mission.py $(BIN)/mission
	install -m 0755 koitab.py $(BIN)/koitab
	ln -sf koitab $(BIN)/koid
	for page in $(PAGES); do \
	    name=$${page##*/}; name=$${name%.*}; topic=$${name#*-}; \
	    [ "$$topic" != "$$name" ] || topic=; \
	    $(PYTHON) -IS $${name%%-*}.py man $$topic >$$page && \
	    chmod 0644 $$page || exit 1; done
	ln -sf ../man1/koitab.1 $(MAN)/man8/koid.8
	@[ -n "$(DESTDIR)" ] || for name in mission koitab koid; do \
	    $(BIN)/$$name --version >/dev/null || exit 1; done

uninstall: ## remove them again; configurations, logs and state stay
	rm -f $(BIN)/mission $(BIN)/koitab $(BIN)/koid $(PAGES) $(MAN)/man8/koid.8

sums: ## SHA-256 of what is installed
	@if command -v sha256sum >/dev/null; then sha256sum mission.py koitab.py; \
	else shasum -a 256 mission.py koitab.py; fi
