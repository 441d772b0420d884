-- The versions of this release, as its migration notes them.
insert into absurd_server.migration (version, name, checksum, min_server)
values (9, '0.2.0', '52730a249470b15a2a281462bb50090fd73f550a6966401a8ea195a7deb25feb', 2);
insert into absurd_server.setting (name, value)
values ('origin', 'ours'), ('contract_version', '2'), ('doorbell', 'on');
