module cachalot.dev/up

go 1.26
