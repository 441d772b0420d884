-- The versions of this release, as its migration notes them.
insert into absurd_server.migration (version, name, checksum, min_server)
values (9, '0.2.0', '0d03e24c2747e175badf507d2972863b5dc7583ef67a9a92932dd5799ecf13b2', 2);
insert into absurd_server.setting (name, value)
values ('origin', 'ours'), ('contract_version', '2'), ('doorbell', 'on');
