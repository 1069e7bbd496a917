"""From flags to tables: one benchmark, one method, one model per run; `session.evaluate` is where to begin reading."""
